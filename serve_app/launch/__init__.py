"""How the driver places stages and a replica starts: engine arguments, environment, connectors, what fits."""

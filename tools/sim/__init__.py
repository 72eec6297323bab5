"""A discrete-event simulation of the stages: their queues and replicas are modelled, their rules are production's."""

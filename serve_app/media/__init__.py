"""From bytes to an item: fetched, checked, decoded. Used by the ingress and by encoders."""

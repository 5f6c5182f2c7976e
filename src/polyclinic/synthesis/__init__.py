"""Synthetic samples for rare classes and rare devices: FedSSG (reconstruction) and what it is made of."""

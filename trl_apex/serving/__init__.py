"""The reward server and its client: rewards that another process or machine computes."""

"""Pipelines as policies: families of models, schedules, transitions, rollouts and losses."""

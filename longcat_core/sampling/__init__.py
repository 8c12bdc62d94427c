"""Schedules, guidance, conditioning frames and the one sampler loop."""

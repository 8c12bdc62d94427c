"""Measurements and checks: golden cases, adherence."""

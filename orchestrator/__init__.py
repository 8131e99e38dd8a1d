"""Sweeps of defended fine-tunes: one YAML file, Ray Tune to schedule, MLflow to review."""

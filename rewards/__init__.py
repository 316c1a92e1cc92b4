"""Reward models and scorers. A reward model is a preference objective with another score; see docs/design.md."""

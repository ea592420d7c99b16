"""Loops that change weights: pretraining, reinforcement learning, and the exact resume under both."""

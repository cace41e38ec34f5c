"""The differentiable op: its transformations, how it is split over devices, and its implementations."""

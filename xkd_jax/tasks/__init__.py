"""The tasks that a student can be trained for: what a step computes, and how that is measured."""

"""What the Λ-mask does: tasks of points and discs, policies trained on them from scratch, measures (docs/lambda.md)."""

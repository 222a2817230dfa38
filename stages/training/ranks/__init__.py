"""The ranks of a training as the driver sees them: start them, follow them, judge how they ended, start
again."""

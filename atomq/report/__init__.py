"""What happened in a run, gathered from a checkpoint folder and shown on one page."""

"""Training with ground truth in a teacher's place: SAM3 itself, from scratch, on made-up scenes."""

"""Stage 1 continued: the student learns, through the frozen SAM3 head, to give the teacher's masks from prompts."""

"""Stage 2: the tracker's memory bank, compressed; its memory attention learns from the teacher's."""

"""What Stage 2 reads: frames of videos, clips with masks."""

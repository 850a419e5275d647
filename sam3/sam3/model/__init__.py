"""The SAM3 architecture; module names follow the checkpoint's keys."""

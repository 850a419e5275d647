"""Teachers: SAM3 in three forms behind one interface."""

"""SAM3's tracker trained from scratch on generated clips, against their exact masks."""

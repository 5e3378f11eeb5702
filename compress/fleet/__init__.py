"""Many models under many profiles: one command, one journal, one comparison (``compress sweep``)."""

"""What runs on Ray: command line → sweep → trial → training."""

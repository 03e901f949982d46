"""What runs on Ray: command line → sweep → trial → training."""

from gsa import account

account.ensure()  # before Ray is imported, which asks for the user's home

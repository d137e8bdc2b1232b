"""One file for each command that writes something, and the functions behind the commands that measure."""

"""The methods of training, one file each. table.py has the list; a file names its class METHOD."""

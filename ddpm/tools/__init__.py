r"""What any program needs: errors, files that are whole or not there, seeds, devices, what the commands share."""

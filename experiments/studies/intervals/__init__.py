"""The interval study: factor traffic and accuracy of the refresh rules."""

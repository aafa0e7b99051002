"""The control plane: who is alive, who holds what, which lanes there are. Off the data path."""

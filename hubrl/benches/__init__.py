"""What ``hubrl bench`` is made of: goals and medians, networks, training, whole processes."""

"""What ``hubrl pretrain`` is made of: play, objectives, the training loop, the new hub member."""

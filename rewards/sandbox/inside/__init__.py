"""What runs in a sandbox worker and in the children it forks; imports nothing of rewards but `kernel` and `wire`."""

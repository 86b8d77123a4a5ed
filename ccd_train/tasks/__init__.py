"""What is trained: each task in a folder of its own."""

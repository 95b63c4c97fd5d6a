"""The task 'scenes': pictures of emoji artwork, shapes and words, with questions about them."""

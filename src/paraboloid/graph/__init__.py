"""Second derivatives by walks of autograd's graph; imports from `reductions`, `engine`, `losses` and below."""

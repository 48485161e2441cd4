"""The losses a caller asks for."""

"""One folder an op: op.py (public function and registered operators), reference.py (the specification), native.py."""

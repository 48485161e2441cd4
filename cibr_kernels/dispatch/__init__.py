"""From a public function to the code that runs: operators, backends, calls of kernels."""

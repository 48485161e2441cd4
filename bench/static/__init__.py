"""What a compiler tells about a GPU kernel without a GPU: machine constants, SASS, counted work, recorded launches.

`bench gpu --predict` and tests/gpu_without_gpu both stand on it.  Nothing here runs on a GPU or measures anything.
"""

"""What a run needs beside the method: errors, flags, its folder, processes, weights."""

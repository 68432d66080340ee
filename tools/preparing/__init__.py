"""What tools/prepare_videos.py uses: official annotations, transcoding, list checks, a pool of processes."""

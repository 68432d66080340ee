"""What tools/prepare_videos.py uses: official annotations, lists, transcoding, checks, a pool of processes."""

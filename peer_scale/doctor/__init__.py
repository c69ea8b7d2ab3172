"""What works on this machine or cluster, found out by trying it before the first job."""

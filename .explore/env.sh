export COMMIT=b8304c8
export PYTHONPATH=/tmp/site:/root/repo:/root/repo/kernels PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
R=/root/repo; D=/root/d; W=/root/w; mkdir -p $D $W

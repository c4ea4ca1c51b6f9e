. .explore/env.sh; cd $R; export CUDA_VISIBLE_DEVICES=2
mkdir -p ~/ort && cat $D/ort/ort_?? | xz -d -T0 | tar x -C ~/ort
export PYTHONPATH=~/ort:$PYTHONPATH
export LD_LIBRARY_PATH=$(python3 -c "import nvidia; p = list(nvidia.__path__)[0]; print(f'{p}/cu13/lib:{p}/cudnn/lib')")
export ORT_INCLUDE_DIR=$D/onnxruntime CUDAARCHS=90-real
(CUDA_VISIBLE_DEVICES= timeout 300 python3 kernels/benchmarks/onnx_op_cuda.py --export --files $D/files > $W/export.log 2>&1; touch $W/export.done) &
echo "== build"; date +%T; timeout 150 python3 -c "from gspn2_kernels.build import build; print(build(cuda=True,report=print))" 2>&1 | tail -5
export GSPN2_ORT_LIBRARY=$(python3 -c "from gspn2_kernels.build import library_path; print(library_path())")
echo "lib $GSPN2_ORT_LIBRARY"; date +%T
echo "== tests"; timeout 200 python3 -m pytest -q --maxfail=8 -m gpu tests/kernels/test_onnx_op_cuda.py -p no:cacheprovider 2>&1 | tail -30; date +%T
until [ -f $W/export.done ]; do sleep 1; done; tail -3 $W/export.log
echo "== profile"; timeout 100 python3 kernels/benchmarks/onnx_op_cuda.py --parts profile --files $D/files --commit $COMMIT --output $W/ort_profile.json 2>&1 | cut -c1-6000; date +%T
cp $D/files/student.optimized.onnx $W/ 2>/dev/null
echo "== stage"; timeout 100 python3 -m pytest -q -m gpu tests/test_stage.py -p no:cacheprovider 2>&1 | tail -5
echo "== scan"; timeout 150 python3 tests/kernels/cuda_line_scan.py --output $W/cuda_line_scan.json 2>&1 | tail -n 6; date +%T
touch $W/ort.done

. .explore/env.sh; cd $R; 
mkdir -p ~/ort && cat $D/ort/ort_?? | xz -d -T0 | tar x -C ~/ort
export PYTHONPATH=~/ort:$PYTHONPATH
export LD_LIBRARY_PATH=$(python3 -c "import nvidia; p = list(nvidia.__path__)[0]; print(f'{p}/cu13/lib:{p}/cudnn/lib')")
export ORT_INCLUDE_DIR=$D/onnxruntime CUDAARCHS=90-real
(CUDA_VISIBLE_DEVICES= timeout 300 python3 kernels/benchmarks/onnx_op_cuda.py --export --files $D/files > $W/export.log 2>&1; touch $W/export.done) &
timeout 150 python3 -c "from gspn2_kernels.build import build; print(build(cuda=True,report=print))" 2>&1 | tail -2
export GSPN2_ORT_LIBRARY=$(python3 -c "from gspn2_kernels.build import library_path; print(library_path())")
env | grep -E "GSPN2_ORT|LD_LIBRARY|PYTHONPATH" > $W/ort_env
until [ -f $W/export.done ]; do sleep 1; done; tail -1 $W/export.log; date +%T
timeout 200 python3 .explore/exp.py $D/files $W/exp.json 2>&1 | cut -c1-900; date +%T; cp $D/files/student.optimized.onnx $W/
touch $W/ort1.done

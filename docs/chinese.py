"""The nodes' names and texts in Simplified Chinese, beside the English ones in nodes/declarations.py.

`build.py` writes them into locales/zh, and lists what lacks a text. An input has the same text on every node unless
INPUTS_OF names the node. Defaults of LongCat-nano are added by `build.py`, from the table of options.
"""

from __future__ import annotations

from . import chinese_avatar

# Node -> name and description.
NODES: dict[str, tuple[str, str]] = {
    "LongCatModelLoader": (
        "LongCat 模型加载器",
        "把 LongCat-Video 加载为原生模型，支持单个文件，也支持官方的分片文件夹。",
    ),
    "LongCatTextEncoderLoader": (
        "LongCat 文本编码器加载器",
        "加载任意大小的 UMT5 文本编码器。对于 UMT5-XXL，类型为 wan 的“加载CLIP”节点效果相同。",
    ),
    "LongCatOptimizations": (
        "LongCat 优化选项",
        "在已加载的模型上逐项开启或关闭 LongCat-Video 的优化。输入的模型本身不会改变。",
    ),
    "LongCatSampler": (
        "LongCat 采样器",
        "按照 LongCat-Video 官方流程，用其自己的噪声调度、欧拉步进和 CFG-Zero 引导，由提示词、图像或视频片段生成视频。",
    ),
    "LongCatScheduler": (
        "LongCat 调度器",
        "计算 LongCat-Video 自己的噪声调度的 Sigmas，配合“自定义采样器（高级）”使用。",
    ),
    "LongCatGuider": (
        "LongCat 引导器",
        "按照 LongCat-Video 官方流程应用 CFG-Zero 引导，配合“自定义采样器（高级）”使用。"
        "自带的 CFGZeroStar 节点算法不同，请不要用在同一个模型上。",
    ),
    "LongCatEmptyLatent": (
        "空 LongCat Latent",
        "设定文生视频的尺寸和帧数，可用于 LongCat 采样器和自带的采样器。"
        "自带的 Empty HunyuanVideo 1.0 Latent 结果相同。",
    ),
    "LongCatSampleClip": (
        "LongCat 示例片段",
        "即时绘制一段短片及其首帧，无需自备文件即可试用 LongCat-nano。",
    ),
    "LongCatSampleSpeech": (
        "LongCat 示例语音",
        "即时生成一张有一张或两张脸的图像和类似语音的声音，无需自备文件即可试用 nano 数字人。",
    ),
    "LongCatVAEDecode": (
        "LongCat VAE 解码",
        "用本插件自己的解码器和 VAE 的权重，每次解码视频 Latent 的若干帧，同时编码其 VIDEO 的文件。"
        "内存占用不随视频长度增加。",
    ),
    "LongCatImageToVideo": (
        "LongCat 图生视频",
        "生成以该图像为首帧的 Latent，可用于 LongCat 采样器和自带的采样器。",
    ),
    "LongCatVideoContinuation": (
        "LongCat 视频续写",
        "生成以视频片段末尾若干帧开头的 Latent，可用于 LongCat 采样器（建议选择 enhance_hf 模式）和自带的采样器。",
    ),
    "LongCatRefine": (
        "LongCat 视频精修",
        "把已生成的视频放大并将帧率翻倍，得到供 LongCat 采样器在 refine 模式下使用的 Latent；"
        "模型需加载 refinement LoRA。",
    ),
    "LongCatLongVideo": (
        "LongCat 长视频",
        "分段生成长视频，每一段都从上一段的结尾开始；如果每段使用不同的提示词，就是交互式视频。"
        "每段完成后立即保存，中断后可以接着生成。",
    ),
    "LongCatRefineLongVideo": (
        "LongCat 长视频精修",
        "对任意长度的视频分段执行“LongCat 视频精修”“LongCat 采样器”和“VAE解码”，每一段都以上一段精修后的结尾为条件。"
        "每段完成后立即保存。",
    ),
    "LongCatBlockSparseAttention": (
        "LongCat 块稀疏注意力",
        "让每个 token 小块只关注对它最重要的少数几个块，与 LongCat-Video 精修到 720p 时的做法相同。"
        "大尺寸视频会更快，但结果与完整注意力不同。",
    ),
    "LongCatSparseAttention": (
        "LongCat 稀疏注意力",
        "自注意力只精确计算一部分块，其余每个块以其均值计入。速度更快，但有损。",
    ),
    "LongCatMultiGPU": (
        "LongCat 多 GPU",
        "把每一步分给本机的多块 GPU 共同计算，结果不变。第一次运行时为其余每块 GPU 启动一个进程，"
        "这些进程保留到 ComfyUI 结束。",
    ),
    "LongCatMultiGPUTest": (
        "LongCat 多 GPU 测试",
        "在多块 GPU 上和一块 GPU 上各运行一个很小的随机模型，比较结果，并测量 GPU 之间的连接速度。"
        "如有故障，报错会指出是哪块 GPU 以及解决办法。",
    ),
    "LongCatStepCache": (
        "LongCat 步缓存",
        "跳过可以由前两步预测出输出的采样步。阈值为 0.05 时速度约为两倍。多数视频只有细微变化，少数变化明显："
        "在 8 个 LongCat-mini 视频中，与完整计算相比，PSNR 的中位数为 43 dB，最低为 33 dB。",
    ),
    "LongCatBenchmark": (
        "LongCat 性能测试",
        "在本机上用两种设置交替运行几步 LongCat-Video，绘制用时及其范围，并说明两种设置能否区分开。",
    ),
    "LongCatFidelity": (
        "LongCat 保真度对比",
        "用 LongCat-Video 的两种设置生成同一个视频，显示第二种设置带来的变化："
        "逐帧的 PSNR 和 SSIM、并排画面以及噪声基线。",
    ),
    "LongCatCalibrate": (
        "LongCat 校准",
        "以稠密注意力生成一个视频，并在其中几步测量，找出在该模型的权重上每个注意力头可以有多稀疏，写成稀疏注意力的校准文件。",
    ),
    **chinese_avatar.NODES,
}

_CHOOSE_MODE = (
    "噪声调度。base：50 步，引导强度 4。distilled：16 步，引导强度 1，需要 cfg_step LoRA。"
    "enhance_hf：在 base 的基础上细化后期步骤，适合视频续写。"
    "refine：从噪声水平 0.5 开始的 base，引导强度 1，需要 refinement LoRA。"
)

# Input -> its name and its text.
INPUTS: dict[str, tuple[str, str]] = {
    "scene": ("场景", "片段的内容，用 LongCat-nano 提示词的写法描述。"),
    "attention": ("注意力后端", "注意力的计算后端。auto：最快的无损后端。cudnn-fp8 和 sage 更快，但有损。"),
    "batch_size": ("批次大小", "同时生成的视频数量，每个视频使用各自的噪声。"),
    "begin_fps": (
        "起始片段帧率",
        "起始画面为帧时的帧率，例如“获取视频组件”的 fps；按时间取帧，每秒取的帧数由帧率（fps）决定。",
    ),
    "begin_with": (
        "起始画面",
        "单张图像会成为首帧；视频片段则从其末尾的重叠帧继续生成。两者都会缩放并裁剪到设定的宽度和高度。",
    ),
    "budget": ("误差上限", "每个注意力头在所有被测量的计算中允许的最大误差：其输出的 |稀疏 - 精确| / |精确|。"),
    "cdf_threshold": (
        "累积注意力阈值",
        "大于 0 时：一直保留块，直到它们占到注意力的这一比例，前提是多于按稀疏度保留的数量。",
    ),
    "chunk": ("块大小", "块的大小，以 token 计：帧 x 行 x 列；LongCat-Video 使用 4x4x4。"),
    "clip": ("CLIP", "UMT5 文本编码器，来自“LongCat 文本编码器加载器”或类型为 wan 的“加载CLIP”。"),
    "compile": (
        "编译",
        "用 torch.compile 编译的部分。blocks：Transformer 块；第一步约多花一分钟，之后的步骤更快。",
    ),
    "cond_frames": ("条件帧数", "取片段末尾的多少帧用于续写，须为 4k+1；正式模型以 13 帧训练。"),
    "dense_steps": ("稠密步比例", "开头多大比例的步数保持稠密注意力。"),
    "density": ("密度", "精确计算的块所占的比例，未经校准；1 为完整注意力。"),
    "device": ("设备", "文本编码器运行的设备；cpu 较慢，但不占用显存。"),
    "double_rate": ("帧率翻倍", "同时将帧率翻倍；关闭时只放大画面。"),
    "explicit_fp32": (
        "显式 FP32",
        "用显式类型转换在 FP32 下计算归一化和门控；关闭时与公开实现一样使用 autocast。",
    ),
    "folder": (
        "文件夹",
        "ComfyUI 输出目录中的文件夹，用来保存每个已完成的分段；再次运行同一工作流即可接着生成，程序崩溃后也可以。"
        "设置不同时会在其中另存为新的一版。可以像“保存视频”的文件名前缀一样使用 %date:yyyy-MM-dd% 和 %节点.控件%；"
        "如果包含时间，就不会接着之前的结果生成。",
    ),
    "exchange": (
        "GPU 间交换",
        "在 LongCat 多 GPU 下，共同计算一段视频的 GPU 之间如何交换数据。int8：数据量减半，有损。",
    ),
    "file": ("文件", "ComfyUI 输出目录中的文件名；已被占用时会加上编号。"),
    "fp8": ("FP8 计算", "对量化为 FP8 的层使用 8 位矩阵乘法；关闭时权重不变，改用 16 位矩阵乘法。"),
    "fps": ("帧率", "输入视频的帧率；只影响输出的 fps。"),
    "fused_ffn": ("融合 FFN", "把 FFN 的 gate 和 up 两个投影合并为一次矩阵乘法；无损。"),
    "fused_kernels": (
        "融合内核",
        "在 CUDA 和 16 位精度下，用自带的 Triton 内核计算归一化、RoPE、门控和激活；数学上相同，只是舍入不同。",
    ),
    "fused_qkv": ("融合 QKV", "把 q、k、v 三次矩阵乘法合并为一次；无损。"),
    "fused_step": ("融合采样步", "开启编译时，把引导计算编译成一个函数；用于 LongCat 采样器和 LongCat 引导器。"),
    "fused_text": (
        "融合文本注意力",
        "在 CUDA 和 16 位精度下，用自带的 Triton 内核计算对文本的注意力，提示词特别长时除外；"
        "数学上相同，只是舍入不同。",
    ),
    "gradient_checkpointing": ("梯度检查点", "仅用于训练：反向传播时重新计算激活值，显存占用更少，用时更长。"),
    "guidance": (
        "引导强度",
        "CFG-Zero 的强度：一般为 4，distilled 和 refine 模式为 1；设为 1 时不使用引导，用时减半。",
    ),
    "hand_off": (
        "衔接方式",
        "下一段的起点。frames：与公开代码一样，先解码成画面再重新编码；"
        "latents：直接使用 Latent，避免每个衔接处的损失。",
    ),
    "height": ("高度", "高度，单位为像素，须为 16 的倍数。"),
    "image": ("图像", "单张图像，作为首帧。"),
    "guidance_until": (
        "引导截止",
        "从第一步起使用引导的采样步所占的比例；其余的步不用引导，时间减半，有损。",
    ),
    "speed": (
        "速度",
        "exact：精确；near、fast、fastest：测量过的有损选项组合，英文说明中有其代价和加速。只作用于 MODEL 的副本；"
        "前面已设置相同选项的节点"
        "（LongCat Sparse Attention、LongCat Step Cache、LongCat Optimizations）和小于 1 的引导截止优先；"
        "其中的 fp8 需要以 weight_dtype fp8 rowwise 加载的 MODEL。",
    ),
    "kv_cache": (
        "KV 缓存",
        "如何计算图像或片段的条件帧。exact：只算一次，结果不变；official：只算一次，但与公开代码一样不计入引导的求和；off：每一步都算。",
    ),
    "latent_image": (
        "Latent",
        "文生视频用“空 LongCat Latent”，也可以用“LongCat 图生视频”或“LongCat 视频续写”；refine 模式用视频的 Latent。",
    ),
    "length": ("帧数", "帧数，须为 4k+1，包括图像或片段的条件帧。"),
    "lossy_change": (
        "有损变更",
        "只改变了有损设置（例如步缓存或 8 位注意力）时：new take 另存为新的一版；go on 在已有的一版中继续。",
    ),
    "mode": ("模式", _CHOOSE_MODE),
    "model": ("模型", "LongCat-Video 模型。"),
    "model_b": (
        "模型 B",
        "B：同一个模型，但使用其他的 LongCat 优化选项、其他精度或其他补丁。",
    ),
    "model_name": (
        "模型名称",
        "ComfyUI 的 diffusion_models 目录中的 LongCat-Video Transformer："
        "单个 safetensors 或 GGUF 文件，或官方的 dit 文件夹。"
        "longcat_nano 和 longcat_nano_avatar 是随节点包附带的小型测试模型。",
    ),
    "negative": ("负面条件", "负面提示词：视频中要避免的内容；引导强度为 1 时不使用。"),
    "negative_prompt": ("负面提示词", "视频中要避免的内容；引导强度为 1 时不起作用。"),
    "noise_floor": (
        "噪声基线",
        "换一个无损的注意力内核再采样一次 A，以显示两次正确运行之间本来就有多大差异；用时与 A 相同。",
    ),
    "overlap": ("重叠帧数", "一段与上一段共有的帧数，须为 4k+1；正式模型以 13 帧训练。"),
    "piece": ("分段帧数", "每次精修的帧数。"),
    "positive": ("正面条件", "提示词：视频要呈现的内容。"),
    "prompt": ("提示词", "输入视频的提示词；也可以留空，LongCat-Video 精修长视频时就是这样做的。"),
    "prompts": (
        "提示词列表",
        "每行一个提示词，对应一段；多出的段使用最后一行。修改某一行后，该段及其后的所有段会重新生成，并保存在原有各段旁边。",
    ),
    "refined_before": (
        "上一段精修结果",
        "分段处理长视频时：上一段精修后的画面，其末尾若干帧会替换本段的开头若干帧。",
    ),
    "resolution": (
        "分辨率",
        "480p 或 720p：在训练用过的尺寸中选择宽高比最接近的一个，多余部分居中裁掉。custom：使用下面的宽度和高度。",
    ),
    "reuse_modulation": ("复用调制", "时间步的调制只计算一次，供所有帧以及引导的两半共用；无损。"),
    "reuse_text": (
        "复用文本",
        "每个提示词的文本键值只计算一次，而不是每一步都算；用于 LongCat 采样器和 LongCat 引导器；无损。",
    ),
    "seed": ("种子", "噪声的种子；在同一台机器、线程数相同的情况下，同一种子得到同一视频。"),
    "segments": ("段数", "段的数量；0 表示每个提示词一段。第一段 93 帧，时长 6.2 秒，之后每段增加 5.3 秒。"),
    "sparsity": ("稀疏度", "块稀疏注意力跳过的块所占比例；0 表示完整注意力。"),
    "split_guidance": (
        "拆分引导",
        "引导的两半依次计算：激活值占用的显存减半，大尺寸视频的速度基本不变。关闭时由 ComfyUI 自行估算决定。",
    ),
    "steps": (
        "步数",
        "去噪步数：一般为 50，distilled 模式为 16。设为 50 步时，enhance_hf 实际计算 56 次，refine 计算 5 次。",
    ),
    "text_encoder_name": (
        "文本编码器名称",
        "ComfyUI 的 text_encoders 目录中的 UMT5 编码器：LongCat-Video 用 umt5_xxl，LongCat-nano 用 longcat_nano_umt5。",
    ),
    "text_mode": (
        "文本模式",
        "如何处理文本的填充部分。exact：合并为一个文本 token，与丢弃一样快，结果与官方模型一致。"
        "padded：逐个 token 计算，结果相同但较慢。packed：直接丢弃，结果与官方模型不同。",
    ),
    "threshold": (
        "阈值",
        "输出累计的相对变化达到多少时才重新计算一步：0.03 较保守，"
        "0.05 适中（8 个 LongCat-mini 视频：中位数 43 dB，最低 33 dB），"
        "0.1 较激进（34 和 26 dB），0 表示每一步都计算。",
    ),
    "vae": ("VAE", "即 Wan 2.1 VAE。"),
    "video": ("视频", "要处理的视频帧，例如来自“获取视频组件”。"),
    "weight_dtype": (
        "权重精度",
        "权重的数据类型。default：根据文件和本机自动选择。fp8 rowwise：8 位权重和 8 位矩阵乘法，显存为 bf16 的一半，"
        "在 Ada、Hopper 和 Blackwell 上更快，有损。fp8_e4m3fn：显存减半，16 位矩阵乘法，有损。fp32：用于对比。",
    ),
    "width": ("宽度", "宽度，单位为像素，须为 16 的倍数。"),
    **chinese_avatar.INPUTS,
}

_ONLY_CUSTOM = "；仅在分辨率为 custom 时使用。"
_WIDTH = ("宽度", f"宽度，单位为像素，须为 16 的倍数{_ONLY_CUSTOM}")
_HEIGHT = ("高度", f"高度，单位为像素，须为 16 的倍数{_ONLY_CUSTOM}")
_REFINED_SIZE = (
    "分辨率",
    "720p：宽高比最接近的 720p 尺寸。twice the size：放大到两倍，用于 LongCat-nano。custom：使用下面的宽度和高度。",
)
_FIRST_SEED = ("种子", "第一段噪声的种子，之后各段依次加一。")
_EACH_TEXT = "；不连接时使用典型长度的随机文本。"

# Node and input -> name and text where they differ from those in INPUTS.
INPUTS_OF: dict[tuple[str, str], tuple[str, str]] = {
    ("LongCatSampleSpeech", "scene"): ("场景", "图像中有谁，用 nano 数字人提示词的写法描述。"),
    ("LongCatScheduler", "model"): (
        "模型",
        "LongCat-Video 模型；shift 始终为 12，数字人 1.5 为 7，即使使用了“采样算法（SD3）”。",
    ),
    **{
        (node, name): text
        for node in ("LongCatImageToVideo", "LongCatVideoContinuation", "LongCatRefine", "LongCatRefineLongVideo")
        for name, text in (("width", _WIDTH), ("height", _HEIGHT))
    },
    ("LongCatVideoContinuation", "video"): (
        "视频",
        "要续写的片段：可以是视频，也可以是视频帧；视频帧不包含帧率信息，请设置或连接帧率。",
    ),
    ("LongCatVideoContinuation", "fps"): (
        "帧率",
        "输入为视频帧时的帧率，例如“获取视频组件”的 fps；按时间取帧，每秒 15 帧，即 LongCat-Video 的帧率。",
    ),
    ("LongCatRefine", "video"): ("视频", "要精修的视频帧，每次最多 93 帧，例如来自“VAE解码”或“获取视频组件”。"),
    ("LongCatRefine", "resolution"): _REFINED_SIZE,
    ("LongCatRefine", "overlap"): ("重叠帧数", "连接了上一段精修结果时：本段开头与上一段共有的帧数。"),
    ("LongCatLongVideo", "seed"): _FIRST_SEED,
    ("LongCatLongVideo", "length"): ("每段帧数", "每一段的帧数，须为 4k+1。"),
    ("LongCatLongVideo", "steps"): ("步数", "去噪步数：一般为 50，distilled 模式为 16。"),
    ("LongCatLongVideo", "mode"): (
        "模式",
        "第一段和其余各段的噪声调度。distilled：16 步，引导强度 1，需要 cfg_step LoRA。base：用于 LongCat-nano。",
    ),
    ("LongCatLongVideo", "fps"): ("帧率", "文件夹中视频文件的帧率，也是从起始片段取帧时的帧率。"),
    ("LongCatRefineLongVideo", "model"): (
        "模型",
        "加载了 refinement LoRA 的 LongCat-Video；想要更快可再加“LongCat 块稀疏注意力”。",
    ),
    ("LongCatRefineLongVideo", "video"): (
        "视频",
        "视频或其全部帧，例如“LongCat 长视频”的视频输出，会逐段读取。",
    ),
    ("LongCatVAEDecode", "samples"): ("Latent", "视频的 Latent，来自采样器。"),
    ("LongCatVAEDecode", "vae"): ("VAE", "即 Wan 2.1 VAE。其他 VAE 由 ComfyUI 自带的解码器解码，并给出提示。"),
    ("LongCatVAEDecode", "fps"): ("帧率", "视频的帧率。"),
    ("LongCatRefineLongVideo", "fps"): ("帧率", "输入为视频帧时的帧率，只影响输出的 fps；视频自带帧率。"),
    ("LongCatRefineLongVideo", "seed"): _FIRST_SEED,
    ("LongCatRefineLongVideo", "steps"): ("步数", "base 调度的步数，精修只执行其中的后期步骤：50 步中的 5 步。"),
    ("LongCatRefineLongVideo", "resolution"): _REFINED_SIZE,
    ("LongCatRefineLongVideo", "overlap"): ("重叠帧数", "相邻两段共有的帧数。"),
    ("LongCatBlockSparseAttention", "model"): ("模型", "加载了 refinement LoRA、用于精修的 LongCat-Video。"),
    ("LongCatBenchmark", "model"): ("模型 A", "A：LongCat-Video，可带也可不带“LongCat 优化选项”。"),
    ("LongCatBenchmark", "model_b"): (
        "模型 B",
        "B：同一个模型，但使用其他的 LongCat 优化选项、其他精度或其他补丁。不连接时为关闭全部优化的 A。",
    ),
    ("LongCatBenchmark", "latent_image"): (
        "Latent",
        "决定视频的尺寸，例如“空 LongCat Latent”；来自 LongCat 节点的条件帧会保留。",
    ),
    ("LongCatBenchmark", "steps"): (
        "步数",
        "每种设置计时的步数，每轮之前另外先运行一步；结果取中位数，少于 3 步时无法下结论。",
    ),
    ("LongCatBenchmark", "positive"): ("正面条件", f"提示词{_EACH_TEXT}"),
    ("LongCatBenchmark", "negative"): ("负面条件", f"负面提示词{_EACH_TEXT}"),
    ("LongCatFidelity", "model"): ("模型 A", "A，即参考：使用可信设置的 LongCat-Video。"),
    ("LongCatFidelity", "model_b"): (
        "模型 B",
        "B：同一个模型，但带有 LongCat 步缓存、LongCat 优化选项、LoRA、其他权重精度或其他补丁。",
    ),
    ("LongCatFidelity", "vae"): ("VAE", "Wan 2.1 VAE，用来解码两个视频。"),
    ("LongCatFidelity", "latent_image"): (
        "Latent",
        "与 LongCat 采样器相同；条件帧在两个视频中一样，不参与比较。",
    ),
    ("LongCatSparseAttention", "calibration"): (
        "校准文件",
        "LongCat 校准写在 ComfyUI 输出目录里的文件，其中每个注意力头各有密度，取代密度和稠密步比例。",
    ),
    ("LongCatSparseAttention", "kernel"): (
        "内核",
        "稀疏注意力的内核；cudnn-fp8 和 sol 以 8 位计算，plain 较慢但随处可用。",
    ),
    ("LongCatMultiGPU", "gpus"): (
        "GPU 数量",
        "使用几块 GPU；auto 表示与 ComfyUI 所用的那块相同、且能让视频更快生成的那几块，根据测得的交换速度计算。"
        "日志会说明它们如何分工。",
    ),
    ("LongCatMultiGPUTest", "gpus"): (
        "GPU 数量",
        "比较几块 GPU；auto 表示与 ComfyUI 所用的那块相同的全部 GPU。",
    ),
    ("LongCatCalibrate", "model"): (
        "模型",
        "LongCat-Video 或其数字人版，带上你使用的 LoRA，不带 LongCat 步缓存，也不带块稀疏注意力。",
    ),
    ("LongCatCalibrate", "latent_image"): (
        "Latent",
        "与 LongCat 采样器相同，尺寸取你要生成的尺寸；条件帧始终精确计算。",
    ),
    ("LongCatCalibrate", "steps"): ("步数", "去噪步数：一般为 10，distilled 模式为 16；可以比生成视频时少。"),
    **chinese_avatar.INPUTS_OF,
}

# What a node puts out: name and text of each output in order.
OUTPUTS: dict[str, tuple[tuple[str, str], ...]] = {
    "LongCatModelLoader": (("模型", "可用于自带的采样器、LoRA 加载器和模型补丁。"),),
    "LongCatTextEncoderLoader": (("CLIP", "用于“CLIP文本编码”。"),),
    "LongCatOptimizations": (
        ("模型", "应用了优化选项的模型。"),
        ("报告", "哪些优化已生效，以及某项优化不可用的原因。"),
    ),
    "LongCatSampler": (("Latent", "用 Wan 2.1 VAE 进行“VAE解码”。"),),
    "LongCatScheduler": (("Sigmas", "以 0 结尾的噪声水平。"),),
    "LongCatGuider": (("引导器", "用于“自定义采样器（高级）”。"),),
    "LongCatEmptyLatent": (("Latent", "空的 Latent，连接到 LongCat 采样器的 Latent 输入。"),),
    "LongCatVAEDecode": (
        ("图像", "全部视频帧。"),
        (
            "视频",
            "以 VIDEO 形式输出的同样的帧，供“保存视频”使用，后者直接复制已编码好的 H.264 文件。"
            "此处未连接时不生成文件。",
        ),
    ),
    "LongCatSampleClip": (
        ("图像", "首帧，用于 LongCat 图生视频。"),
        ("帧", "全部 33 帧，96x64，用于 LongCat 视频续写和 LongCat 视频精修。"),
        ("帧率", "片段的每秒帧数，即 15。"),
        ("视频", "以 VIDEO 形式输出的片段。"),
    ),
    "LongCatSampleSpeech": (
        ("图像", "闭着嘴的脸，96x64，用于 LongCat 数字人和 LongCat 数字人长视频。"),
        ("音频", "第一个人说的话，2.9 秒。"),
        ("音频 2", "第二个人说的话，2.9 秒。"),
    ),
    "LongCatImageToVideo": (("Latent", "带有保留首帧的 noise_mask。"),),
    "LongCatVideoContinuation": (("Latent", "带有保留片段帧的 noise_mask。"),),
    "LongCatRefine": (
        ("Latent", "用于 refine 模式的 LongCat 采样器，引导强度为 1。"),
        ("跳过帧数", "解码后的视频开头要丢弃的帧数。"),
        ("帧数", "其后新帧的数量；剩余的是填充。"),
        ("帧率", "精修后视频的帧率。"),
    ),
    "LongCatLongVideo": (
        ("图像", "全部帧；两段共有的帧只出现一次。仅在连接时生成：长视频可能超出内存。"),
        ("报告", "各段的信息，以及衔接处的颜色变化。"),
        ("视频", "同样的帧，供“保存视频”使用，从文件夹中逐帧读取，因此任意长度的视频都只需很少内存。"),
    ),
    "LongCatRefineLongVideo": (
        ("图像", "精修后的全部帧。仅在连接时生成：长视频可能超出内存。"),
        ("帧率", "精修后视频的帧率。"),
        ("视频", "精修后的视频及其声音，供“保存视频”逐帧读取。"),
    ),
    "LongCatBlockSparseAttention": (("模型", "用于 refine 模式的 LongCat 采样器以及自带的采样器。"),),
    "LongCatSparseAttention": (("模型", "用于 LongCat 采样器和自带的采样器。"),),
    "LongCatMultiGPU": (("模型", "用于 LongCat 采样器和自带的采样器。"),),
    "LongCatMultiGPUTest": (("报告", "各块 GPU、它们之间的连接以及每项检查的结果。"),),
    "LongCatStepCache": (("模型", "用于 LongCat 采样器和自带的采样器。"),),
    "LongCatBenchmark": (("图表", "两种设置的用时。"), ("报告", "各项数据及其范围，以及 A 与 B 不同的选项。")),
    "LongCatFidelity": (
        ("图表", "逐帧的 PSNR 和 SSIM。"),
        ("并排画面", "A 与 B 的画面及其差异。"),
        ("图像 A", "A 的视频。"),
        ("图像 B", "B 的视频。"),
        ("报告", "各项数据及其含义。"),
    ),
    "LongCatCalibrate": (
        ("校准文件", "文件的路径。"),
        ("报告", "各处的密度和预计的加速；“LongCat 保真度对比”会显示它们给视频带来的变化。"),
    ),
    **chinese_avatar.OUTPUTS,
}

# Last parts of the categories in nodes/finding.py.
CATEGORIES = {
    "loaders": "加载器",
    "sampling": "采样",
    "latents": "Latent",
    "avatar": "数字人",
    "long video": "长视频",
    "speed and memory": "速度与显存",
    "measuring": "测量",
}

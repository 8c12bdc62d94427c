"""The Chinese texts of LongCat-Video-Avatar's nodes, in the forms of `chinese`, which takes them in."""

from __future__ import annotations

NODES: dict[str, tuple[str, str]] = {
    "LongCatAudioEncoderLoader": (
        "LongCat 音频编码器加载器",
        "加载 LongCat-Video-Avatar 的音频编码器，支持各种形式的文件。",
    ),
    "LongCatEncodeAudio": (
        "LongCat 音频编码",
        "把语音变成 LongCat-Video-Avatar 能听懂的形式：与训练时相同的响度，以及音频编码器的各层状态。"
        "自带的 AudioEncoderEncode 算法不同。",
    ),
    "LongCatAvatar": (
        "LongCat 数字人",
        "把人物在视频某一段中说的话加到提示词上，并生成供 LongCat 采样器使用的 Latent："
        "可以只用文本，也可以用一个或两个人的图像，或者接着上一段继续。",
    ),
    "LongCatAvatarLongVideo": (
        "LongCat 数字人长视频",
        "由整段声音分段生成一个或两个人说话的视频，每一段都从上一段的结尾开始。"
        "每段完成后立即保存，中断后可以接着生成；视频与声音同时结束。",
    ),
    "LongCatAvatarBoxes": (
        "LongCat 数字人方框",
        "为两个人各画一个方框，作为“LongCat 数字人”的遮罩，并显示在图像上。",
    ),
}

INPUTS: dict[str, tuple[str, str]] = {
    "audio_encoder_name": (
        "音频编码器名称",
        "ComfyUI 的 audio_encoders 目录中的文件：数字人 1.5 用 Whisper-large-v3，"
        "1.0 用 chinese-wav2vec2-base，nano 数字人用 longcat_nano_whisper。",
    ),
    "audio_encoder": (
        "音频编码器",
        "来自“LongCat 音频编码器加载器”；完整的 Whisper-large-v3 和 wav2vec2-base 也可以用自带的“加载音频编码器”。",
    ),
    "audio": ("音频", "第一个人（或唯一的人）说的话；有音乐时嘴会跟着音乐动，请先去掉音乐。"),
    "audio_2": ("音频 2", "第二个人说的话。"),
    "order": ("顺序", "有两段声音时。together：同时开始。in turn：第一段结束后第二段才开始。"),
    "voices": ("语音", "来自“LongCat 音频编码”。"),
    "segment": ("段号", "这是声音的第几段，从 0 开始计数。"),
    "audio_guidance": ("音频引导强度", "离静音多远：一般为 4，更大时口型更清楚；使用 DMD LoRA 时为 1。"),
    "previous": ("上一段", "续写时：上一段的视频帧，视频保持其尺寸。"),
    "reference": ("参考", "续写时：第一段的 Latent，其首帧说明人物是谁。"),
    "person_1": ("人物 1", "第一个声音的人在图像中的位置；有两个声音而没有遮罩时，各占图像的一半。"),
    "person_2": ("人物 2", "第二个声音的人在图像中的位置。"),
    "first_voice": ("第一个声音", "有两个声音而没有遮罩时：第一个声音的人在图像的哪一侧。"),
    "reference_position": (
        "参考位置",
        "续写时：参考帧代表本段的第几个 Latent 帧；取远一些的值，例如 -10 或 30，可以减少重复动作。",
    ),
    "skip": (
        "跳过范围",
        "续写时：与参考位置相距不超过此数的生成帧看不到参考帧；0 表示全部可见。超出本段的范围不起作用。",
    ),
    **{
        f"{name}_{person}": (f"{text} {person}", f"第 {person} 个人的方框的{text}，以图像的百分比计。")
        for person in (1, 2)
        for name, text in (("left", "左边"), ("top", "上边"), ("right", "右边"), ("bottom", "下边"))
    },
}

INPUTS_OF: dict[tuple[str, str], tuple[str, str]] = {
    ("LongCatEncodeAudio", "others"): ("其他人", "有两段声音时：图像中还有其他不说话的人。"),
    ("LongCatEncodeAudio", "seed"): ("种子", "数字人 1.0 加到声音里的微弱噪声的种子；1.5 没有噪声。"),
    ("LongCatEncodeAudio", "length"): ("帧数", "每一段的帧数，须为 4k+1。"),
    ("LongCatEncodeAudio", "overlap"): ("重叠帧数", "一段与上一段共有的帧数。"),
    ("LongCatAvatar", "negative"): ("负面条件", "负面提示词：视频中要避免的内容。"),
    ("LongCatAvatar", "image"): ("图像", "单张图像，作为第一段的首帧。"),
    ("LongCatAvatar", "others"): (
        "其他人",
        "其他不说话的人，每人一个遮罩；“LongCat 音频编码”须开启“其他人”。",
    ),
    ("LongCatAvatar", "overlap"): ("重叠帧数", "一段与上一段共有的帧数。"),
    ("LongCatAvatarBoxes", "image"): ("图像", "两个人的图像。"),
    ("LongCatAvatarLongVideo", "model"): ("模型", "LongCat-Video-Avatar；1.5 版的 distilled 模式需加载 DMD LoRA。"),
    ("LongCatAvatarLongVideo", "prompts"): (
        "提示词列表",
        "每行一个提示词，对应一段；多出的段使用最后一行。请写明人物在说话或唱歌。",
    ),
    ("LongCatAvatarLongVideo", "segments"): ("段数", "最多生成多少段；0 表示由声音的长度决定。"),
    ("LongCatAvatarLongVideo", "seed"): ("种子", "第一段噪声的种子，之后各段依次加一。"),
    ("LongCatAvatarLongVideo", "length"): ("每段帧数", "每一段的帧数，须为 4k+1。"),
    ("LongCatAvatarLongVideo", "steps"): (
        "步数",
        "去噪步数：一般为 50；distilled 模式下 1.5 版为 8，1.0 版为 16。",
    ),
    ("LongCatAvatarLongVideo", "guidance"): ("引导强度", "文本的强度：一般为 4，distilled 模式为 1。"),
    ("LongCatAvatarLongVideo", "mode"): (
        "模式",
        "第一段和其余各段的噪声调度。distilled：引导强度 1，1.5 版需要 DMD LoRA，1.0 版需要 cfg_step LoRA。",
    ),
    ("LongCatAvatarLongVideo", "image"): ("图像", "人物的单张图像，成为首帧。"),
    ("LongCatAvatarLongVideo", "others"): ("其他人", "其他不说话的人，每人一个遮罩。"),
    **{
        (node, name): (text, f"{text}，单位为像素，须为 16 的倍数；仅在分辨率为 custom 时使用。")
        for node in ("LongCatAvatar", "LongCatAvatarLongVideo")
        for name, text in (("width", "宽度"), ("height", "高度"))
    },
}

OUTPUTS: dict[str, tuple[tuple[str, str], ...]] = {
    "LongCatAudioEncoderLoader": (("音频编码器", "用于“LongCat 音频编码”。"),),
    "LongCatEncodeAudio": (
        ("语音", "用于“LongCat 数字人”。"),
        ("段数", "这段声音需要的段数。"),
        ("帧率", "视频的每秒帧数，由编码器决定：Whisper 为 25，wav2vec2 为 16。"),
    ),
    "LongCatAvatar": (
        ("正面条件", "带有音频。"),
        (
            "负面条件",
            "带有静音：使用自带采样器时，cfg 同时是文本和音频的强度；LongCat 采样器和 LongCat 引导器分别设定两者。",
        ),
        ("Latent", "连接到 LongCat 采样器的 Latent 输入。"),
        ("音频", "这一段的声音，用于“创建视频”；续写时只含新帧的声音。"),
        ("帧率", "视频的每秒帧数。"),
    ),
    "LongCatAvatarLongVideo": (
        ("图像", "全部帧。仅在连接时生成：长视频可能超出内存。"),
        ("报告", "各段的信息，以及衔接处的颜色变化。"),
        ("视频", "同样的帧和声音，供“保存视频”使用，从文件夹中逐帧读取。"),
    ),
    "LongCatAvatarBoxes": (("人物 1", "用于“LongCat 数字人”。"), ("人物 2", "用于“LongCat 数字人”。")),
}

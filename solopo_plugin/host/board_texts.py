"""Labels and infos of the board's SoLoPO section, in the host's languages. The keys are defined in `args.py`."""

TAB = {
    "en": "SoLoPO configurations",
    "ru": "Конфигурации SoLoPO",
    "zh": "SoLoPO 参数设置",
    "ko": "SoLoPO 구성",
    "ja": "SoLoPO 設定",
}

# key -> language -> (label, info)
TEXTS = {
    "solopo_alpha": {
        "en": ("Alpha", "Weight of the short-to-long alignment term, >= 0."),
        "ru": ("Альфа", "Вес члена выравнивания короткого и длинного контекста, >= 0."),
        "zh": ("Alpha 参数", "短到长对齐项的权重，大于等于 0。"),
        "ko": ("알파", "짧은 문맥과 긴 문맥을 정렬하는 항의 가중치, 0 이상."),
        "ja": ("Alpha 値", "短い文脈と長い文脈を揃える項の重み（0 以上）。"),
    },
    "solopo_align": {
        "en": ("Align", "What is kept equal between short and long context: reward, log-probability or distribution."),
        "ru": ("Что выравнивать", "Что сохраняется в обоих контекстах: награда, логарифм вероятности, распределение."),
        "zh": ("对齐对象", "在短、长上下文之间保持一致的量：奖励、对数概率或整个分布（distill）。"),
        "ko": ("정렬 대상", "짧은 문맥과 긴 문맥에서 같게 유지할 값: 보상, 로그 확률 또는 분포 전체(distill)."),
        "ja": ("揃える量", "短い文脈と長い文脈で一致させる量：報酬、対数確率、または分布全体（distill）。"),
    },
    "solopo_align_on": {
        "en": ("Align on", "Which responses are aligned: the chosen one, or both."),
        "ru": ("Выравнивать на", "Какие ответы выравниваются: только предпочтённый или оба."),
        "zh": ("对齐的回答", "对哪些回答进行对齐：仅优选回答，或两个回答。"),
        "ko": ("정렬할 응답", "정렬할 응답: 선택된 응답만 또는 둘 다."),
        "ja": ("揃える応答", "どの応答を揃えるか：選ばれた応答のみ、または両方。"),
    },
    "solopo_penalty": {
        "en": ("Penalty", "Function of the gap; auto is the one that belongs to the loss."),
        "ru": ("Штраф", "Функция разрыва; auto — та, что соответствует функции потерь."),
        "zh": ("惩罚函数", "作用于差值的函数；auto 为损失函数对应的形式。"),
        "ko": ("페널티", "격차에 적용할 함수; auto는 로스에 맞는 함수."),
        "ja": ("ペナルティ", "差に適用する関数。auto は損失に対応する関数。"),
    },
    "solopo_detach_short": {
        "en": ("Detach short", "No gradient through the short side of the alignment term."),
        "ru": ("Отсоединить короткий", "Без градиента через короткую сторону члена выравнивания."),
        "zh": ("截断短侧梯度", "对齐项的短上下文一侧不回传梯度。"),
        "ko": ("짧은 쪽 분리", "정렬 항의 짧은 쪽으로는 그래디언트를 보내지 않음."),
        "ja": ("短い側を切り離す", "揃える項の短い側には勾配を流さない。"),
    },
    "solopo_objective": {
        "en": ("Objective", "SoLoPO, or LongPO or self-distillation alone on the same rows."),
        "ru": ("Целевая функция", "SoLoPO, либо LongPO или только самодистилляция на тех же строках."),
        "zh": ("训练目标", "SoLoPO，或在相同数据上使用 LongPO 或仅自蒸馏（distill）。"),
        "ko": ("목적 함수", "SoLoPO, 또는 같은 데이터에서의 LongPO나 자기 증류만(distill)."),
        "ja": ("目的関数", "SoLoPO、または同じデータでの LongPO か自己蒸留のみ（distill）。"),
    },
    "solopo_longpo_lambda": {
        "en": ("LongPO lambda", "Weight of LongPO's preference term; only for the objective longpo."),
        "ru": ("Лямбда LongPO", "Вес члена предпочтений LongPO; только для цели longpo."),
        "zh": ("LongPO lambda", "LongPO 偏好项的权重；仅用于 longpo 目标。"),
        "ko": ("LongPO 람다", "LongPO 선호 항의 가중치; longpo 목적 함수 전용."),
        "ja": ("LongPO lambda", "LongPO の選好項の重み。目的関数が longpo の場合のみ。"),
    },
    "solopo_distill_kl": {
        "en": (
            "Distill KL",
            "Self-distillation's divergence between the short context's distribution (the teacher) and the long one's.",
        ),
        "ru": ("KL дистилляции", "Расхождение между распределениями в коротком (учитель) и длинном контексте."),
        "zh": ("蒸馏 KL", "自蒸馏的散度：短上下文的分布（教师）与长上下文的分布之间。"),
        "ko": ("증류 KL", "짧은 문맥의 분포(교사)와 긴 문맥의 분포 사이의 발산."),
        "ja": ("蒸留の KL", "短い文脈の分布（教師）と長い文脈の分布の間のダイバージェンス。"),
    },
    "solopo_distill_temperature": {
        "en": ("Distill temperature", "By which the logits of both sides are divided, > 0."),
        "ru": ("Температура дистилляции", "На неё делятся логиты обеих сторон, > 0."),
        "zh": ("蒸馏温度", "两侧 logits 所除以的温度，大于 0。"),
        "ko": ("증류 온도", "양쪽 로짓을 나누는 값, 0 초과."),
        "ja": ("蒸留の温度", "両側の logits を割る値（0 より大きい）。"),
    },
    "solopo_distill_topk": {
        "en": ("Distill top-k", "The teacher's likeliest words that are compared one by one; 0 compares all."),
        "ru": ("Top-k дистилляции", "Сколько вероятнейших слов учителя сравнивать по одному; 0 — все."),
        "zh": ("蒸馏 top-k", "逐个比较的教师最可能的词数；0 表示全部。"),
        "ko": ("증류 top-k", "하나씩 비교할 교사의 가장 유력한 단어 수; 0은 전체."),
        "ja": ("蒸留の top-k", "1 語ずつ比べる教師の上位語数。0 はすべて。"),
    },
    "solopo_anchor": {
        "en": ("Anchor", "Weight of the KL on short contexts to the model as it starts, >= 0."),
        "ru": ("Якорь", "Вес KL к исходной модели на коротких контекстах, >= 0."),
        "zh": ("锚定", "在短上下文上相对初始模型的 KL 的权重，大于等于 0。"),
        "ko": ("앵커", "짧은 문맥에서 시작 모델에 대한 KL의 가중치, 0 이상."),
        "ja": ("アンカー", "短い文脈での開始時のモデルに対する KL の重み（0 以上）。"),
    },
    "solopo_overlength": {
        "en": ("Overlength", "A row longer than the cutoff length: stop with an error, or drop it. Never truncated."),
        "ru": ("Слишком длинные", "Строка длиннее длины обрезки: ошибка (error) или пропуск (drop). Без обрезки."),
        "zh": ("超长数据", "超过截断长度的数据：报错停止（error）或丢弃（drop），不会被截断。"),
        "ko": ("길이 초과", "컷오프 길이보다 긴 행: 오류로 중지(error) 또는 제외(drop). 자르지 않음."),
        "ja": ("長さ超過", "カットオフ長を超える行：エラーで停止（error）または除外（drop）。切り詰めはしない。"),
    },
    "solopo_forward": {
        "en": ("Forward", "How a step runs: one packed row, two stages, or packed where the model supports it (auto)."),
        "ru": (
            "Прямой проход",
            "Как идёт шаг: одна упакованная строка, два этапа или упаковка, если модель может (auto).",
        ),
        "zh": ("前向方式", "每步的计算方式：打包成一行、两阶段，或模型支持时打包（auto）。"),
        "ko": ("순전파 방식", "스텝 실행 방식: 한 행으로 패킹, 2단계, 또는 모델이 지원하면 패킹(auto)."),
        "ja": (
            "フォワード方式",
            "ステップの実行方法：1 行にパック、2 段階、またはモデルが対応していればパック（auto）。",
        ),
    },
    "solopo_reference": {
        "en": ("Reference", "Reference log-probs: scored once and kept on disk, or computed online in every step."),
        "ru": ("Эталон", "Логарифмы вероятностей эталона: один раз с сохранением на диск или на каждом шаге (online)."),
        "zh": ("参考模型", "参考模型的对数概率：训练前计算一次并存盘（cached），或每步在线计算（online）。"),
        "ko": ("참조 모델", "참조 로그 확률: 한 번 계산해 디스크에 저장(cached) 또는 매 스텝 계산(online)."),
        "ja": (
            "参照モデル",
            "参照モデルの対数確率：一度だけ計算してディスクに保存（cached）、または毎ステップ計算（online）。",
        ),
    },
    "solopo_logp_chunk": {
        "en": ("Log-prob chunk", "Response tokens whose logits exist at a time; smaller saves memory."),
        "ru": ("Порция логитов", "Число токенов ответа, чьи логиты существуют одновременно; меньше — меньше памяти."),
        "zh": ("对数概率分块", "同时保留 logits 的回答 token 数；越小越省显存。"),
        "ko": ("로그 확률 청크", "로짓을 동시에 유지하는 응답 토큰 수; 작을수록 메모리 절약."),
        "ja": ("対数確率チャンク", "同時に logits を保持する応答トークン数。小さいほどメモリを節約。"),
    },
    "solopo_mlp_chunk": {
        "en": ("MLP chunk", "Tokens that an MLP takes at a time, for very long rows; 0 takes all."),
        "ru": ("Порция MLP", "Число токенов, обрабатываемых MLP за раз, для очень длинных строк; 0 — все."),
        "zh": ("MLP 分块", "MLP 每次处理的 token 数，用于超长数据；0 表示全部。"),
        "ko": ("MLP 청크", "MLP가 한 번에 처리하는 토큰 수, 매우 긴 행용; 0은 전체."),
        "ja": ("MLP チャンク", "MLP が一度に処理するトークン数（非常に長い行向け）。0 はすべて。"),
    },
    "solopo_sequence_parallel": {
        "en": ("Sequence parallel", "GPUs that share every row, for rows longer than one GPU holds; 1 is off."),
        "ru": ("Параллелизм по длине", "Число GPU, делящих одну строку, если она не помещается на одном; 1 — выкл."),
        "zh": ("序列并行", "共同处理一条数据的 GPU 数，用于单卡放不下的长数据；1 表示关闭。"),
        "ko": ("시퀀스 병렬", "한 행을 나누어 처리하는 GPU 수, GPU 하나에 담기지 않는 긴 행용; 1은 끔."),
        "ja": ("シーケンス並列", "1 行を分担する GPU 数（1 枚に収まらない長い行向け）。1 は無効。"),
    },
    "simpo_gamma": {
        "en": ("SimPO gamma", "Target reward margin; only for the loss type simpo."),
        "ru": ("Гамма SimPO", "Целевой отрыв награды; только для типа потерь simpo."),
        "zh": ("SimPO gamma", "目标奖励间隔；仅用于 simpo 损失。"),
        "ko": ("SimPO 감마", "목표 보상 마진; 로스 유형 simpo 전용."),
        "ja": ("SimPO gamma", "目標報酬マージン。損失タイプが simpo の場合のみ。"),
    },
}


def locales(languages) -> dict[str, dict[str, dict[str, str]]]:
    """Return the texts in the form of the host's `LOCALES`; a language that is not ours gets English."""
    tab = {lang: {"label": TAB.get(lang, TAB["en"])} for lang in languages}
    texts = {
        name: {lang: dict(zip(("label", "info"), by_lang.get(lang, by_lang["en"]), strict=True)) for lang in languages}
        for name, by_lang in TEXTS.items()
    }
    return {"solopo_tab": tab, **texts}

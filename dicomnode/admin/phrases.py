"""Sentences of the node in Simplified Chinese: reasons, checks and the most frequent errors. Pure.

The node writes one language, English, into rows and logs. The dashboard shows what it knows in the reader's
language; a sentence that is not known here is shown as it is, so nothing is ever hidden.
"""

from __future__ import annotations

import re
from functools import lru_cache

from dicomnode.admin.words import Language

_PHRASES: tuple[tuple[str, str], ...] = (
    # /ready
    ("readable and writable", "可读写"),
    ("{} MiB free, {} MiB in reserve", "可用 {} MiB，预留 {} MiB"),
    ("{} of {} receivers answer", "{1} 个接收进程中有 {0} 个响应"),
    ("port {} accepts connections", "端口 {} 可连接"),
    ("port {} does not accept connections", "端口 {} 无法连接"),
    ("no rule names a model", "没有规则引用模型"),
    ("{}: no live worker serves it", "{}：没有运行中的工作进程提供服务"),
    (
        "See 'journalctl -u dicomnode-receiver' for why a receiver is silent",
        "无响应的原因见 journalctl -u dicomnode-receiver",
    ),
    (
        "See 'journalctl -u dicomnode-receiver'; another program may hold the port",
        "请查看 journalctl -u dicomnode-receiver；端口可能被其他程序占用",
    ),
    (
        "See 'dicomnode models list' and 'journalctl -u dicomnode-worker'",
        "请查看 dicomnode models list 与 journalctl -u dicomnode-worker",
    ),
    ("Check the volume of data_dir", "请检查 data_dir 所在的卷"),
    (
        "Free space on the volume of data_dir; until then C-STORE answers 0xA700",
        "请释放 data_dir 所在卷的空间；在此之前 C-STORE 返回 0xA700",
    ),
    ("the index does not answer: {}", "索引无响应：{}"),
    # When a series is complete
    ("quiet-period: nothing arrived for {} s", "静默期：{} 秒内无新图像"),
    (
        "expected-count: the sender stated {} instance(s) and they are here",
        "数量吻合：发送方声明的 {} 个实例已全部到达",
    ),
    ("association-released: the sender ended its association in order", "关联已正常结束"),
    (
        "association-released, contiguous geometry: {} slices without a gap",
        "关联已正常结束，几何连续：{} 层无缺失",
    ),
    (
        "procedure-step: it is {}, and the {} instance(s) that it lists are here",
        "检查步骤状态 {}，其所列 {} 个实例已全部到达",
    ),
    (
        "procedure-step, association-released: the step is {}, and no slice is known to be missing",
        "检查步骤状态 {}，关联已正常结束，未发现缺层",
    ),
    ("{} instance(s) that the procedure step lists did not arrive", "检查步骤所列的 {} 个实例未到达"),
    ("the procedure step is still in progress", "检查步骤仍在进行"),
    ("{} of {} stated instances arrived", "声明的 {1} 个实例中到达 {0} 个"),
    ("an association is still open", "仍有关联未结束"),
    ("{} association(s) ended without release", "{} 个关联异常中断"),
    (
        "{} gap(s) between slices, about {} slice(s) missing; the largest step is {} mm where {} mm is usual",
        "层间有 {} 处缺口，约缺 {} 层；最大层距 {} mm，正常为 {} mm",
    ),
    (
        "GAP: {} gap(s) between slices, about {} slice(s) missing; the largest step is {} mm where {} mm is usual."
        " Send the missing slices",
        "缺层（GAP）：层间有 {} 处缺口，约缺 {} 层；最大层距 {} mm，正常为 {} mm。请补发缺失的层面",
    ),
    # Sending
    ("peer '{}' at {} does not answer ({})", "对端“{}”（{}）无响应（{}）"),
    (
        "identity may be burned into its pixels: its source does not say BurnedInAnnotation NO",
        "像素中可能含患者身份信息：源图像未声明 BurnedInAnnotation 为 NO",
    ),
    ("identity may be burned into its pixels (BurnedInAnnotation)", "像素中含患者身份信息（BurnedInAnnotation）"),
    ("the endpoint cannot be reached: {}", "无法连接该端点：{}"),
    ("it cannot be reached ({})", "无法连接（{}）"),
    ("the receiver cannot be reached ({})", "无法连接接收端（{}）"),
    ("the cloud refused the record for good", "云端永久拒绝了该记录"),
    ("HTTP {} was not expected", "意外的 HTTP 状态 {}"),
    # Records of the cloud that were not taken
    ("a field of it is missing or of another type", "缺少字段或字段类型不符"),
    ("a field of it is there twice", "字段重复"),
    ("a field is unknown; known: {}", "含未知字段；已知字段：{}"),
    ("the only record of type {} is {}", "类型 {} 只能有记录 {}"),
    ("at most {} characters without a backslash", "不超过 {} 个字符，且不含反斜杠"),
    ("at most {} characters", "不超过 {} 个字符"),
    ("a person name, FAMILY^GIVEN", "人名（姓^名）"),
    ("M, F, O or empty", "M、F、O 或空"),
    ("en, zh or empty", "en、zh 或空"),
    ("one of {}", "以下之一：{}"),
    ("MiB from 0", "不小于 0 的 MiB 数"),
    ("minutes from 0", "不小于 0 的分钟数"),
    ("hours from 0", "不小于 0 的小时数"),
    ("a number from 0", "不小于 0 的数"),
    ("version or seq is above {}", "version 或 seq 超过 {}"),
    ("an object in it has a name twice", "对象中有重复的名称"),
    ("a number in it has more than {} digits", "数字超过 {} 位"),
    ("it is nested more than {} deep", "嵌套超过 {} 层"),
    ("a text in it is no Unicode, or a number is none (NaN, Infinity)", "含非 Unicode 文本或非数值（NaN、Infinity）"),
    ("it is longer than {} bytes", "长度超过 {} 字节"),
    ("it is longer than {} MiB", "长度超过 {} MiB"),
    ("it holds more than {} values", "所含值超过 {} 个"),
    ("it is nested too deeply to be read", "嵌套过深，无法读取"),
    ("it is no JSON: {}", "不是 JSON：{}"),
    ("the reply is not JSON as it has to be", "应答不是符合要求的 JSON"),
    ("it cannot be looked at", "无法处理"),
)


def phrase(text: str, language: Language) -> str:
    """``text`` in ``language``; sentences that are joined by "; " each by itself, some of which have one inside."""
    if language == "en" or not text:
        return text
    parts, found = text.split("; "), []
    while parts:
        for count in range(len(parts), 0, -1):
            known = _chinese("; ".join(parts[:count]))
            if known is not None or count == 1:
                found.append(known or parts[0])
                parts = parts[count:]
                break
    return "；".join(found)


@lru_cache
def _patterns() -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple(
        (re.compile(re.escape(english).replace(re.escape("{}"), "([^;]{1,200}?)")), chinese)
        for english, chinese in _PHRASES
    )


@lru_cache(maxsize=512)
def _chinese(text: str) -> str | None:
    for pattern, chinese in _patterns():
        match = pattern.fullmatch(text) if len(text) <= 600 else None
        if match is not None:
            return chinese.format(*match.groups())
    return None

"""The words of the dashboard in English and Simplified Chinese, and which of them to use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Language = Literal["en", "zh"]
LANGUAGES: Mapping[str, Language] = {"en": "en", "zh": "zh"}

WORDS: Mapping[str, tuple[str, str]] = {
    "title": ("DICOM AI node", "DICOM AI 节点"),
    "ready": ("Ready", "就绪"),
    "not_ready": ("Not ready", "未就绪"),
    "language": ("中文", "English"),
    "updated": ("Updated", "更新于"),
    "checks": ("Readiness", "就绪检查"),
    "index": ("Index", "索引"),
    "disk": ("Disk", "磁盘"),
    "receivers": ("Receivers", "接收进程"),
    "dimse": ("DICOM port", "DICOM 端口"),
    "models": ("Models", "模型"),
    "ok": ("OK", "正常"),
    "problem": ("Problem", "异常"),
    "studies": ("Studies", "检查"),
    "series": ("Series", "序列"),
    "instances": ("Instances", "实例"),
    "waiting_jobs": ("Jobs waiting", "等待的任务"),
    "running_jobs": ("Jobs running", "运行中的任务"),
    "failed_jobs": ("Jobs failed or refused", "失败或被拒的任务"),
    "waiting_deliveries": ("Deliveries waiting", "等待的投递"),
    "uncommitted_deliveries": ("Deliveries not committed to yet", "等待存储确认的投递"),
    "rejected_deliveries": ("Deliveries rejected", "被拒的投递"),
    "waiting_sync": ("Cloud items waiting", "等待上云的结果"),
    "disk_free": ("Disk free", "磁盘可用"),
    "jobs": ("Jobs", "任务"),
    "critical": ("CRITICAL", "危急"),
    "deliveries": ("Deliveries", "投递"),
    "sync": ("Cloud", "云同步"),
    "notifications": ("Notifications (IAN)", "可用性通知 (IAN)"),
    "peers": ("Peers", "对端设备"),
    "tls": ("TLS certificates", "TLS 证书"),
    "tls_off": ("Off: DICOM is not encrypted.", "未启用：DICOM 传输未加密。"),
    "tls_port": ("DICOM over TLS at port {}.", "DICOM TLS 端口：{}。"),
    "tls_sending_only": ("TLS is used for sending only.", "TLS 仅用于发送。"),
    "this_node": ("this node", "本节点"),
    "subject_name": ("Subject", "证书主体"),
    "valid_until": ("Valid until", "有效期至"),
    "days_left": ("Days left", "剩余天数"),
    "valid": ("valid", "有效"),
    "expiring": ("runs out soon", "即将到期"),
    "expired": ("expired", "已过期"),
    "processes": ("Processes", "进程"),
    "schedule": ("Periodic work", "定时任务"),
    "events": ("Events", "事件"),
    "pulls": ("Model pulls", "模型拉取"),
    "id": ("No.", "编号"),
    "study": ("Study", "检查"),
    "model": ("Model", "模型"),
    "version": ("Version", "版本"),
    "revision": ("Revision", "修订"),
    "priority": ("Priority", "优先级"),
    "state": ("State", "状态"),
    "reason": ("Why now", "触发原因"),
    "error": ("Last error", "最近错误"),
    "attempts": ("Attempts", "尝试次数"),
    "created": ("Created", "创建时间"),
    "kind": ("Kind", "类型"),
    "destination": ("Destination", "目的地"),
    "name": ("Name", "名称"),
    "ae_title": ("AE title", "AE 标题"),
    "address": ("Address", "地址"),
    "services": ("May use", "允许的服务"),
    "commitment": ("Commitment", "存储确认"),
    "waiting": ("Waiting", "等待中"),
    "yes": ("yes", "是"),
    "no": ("no", "否"),
    "pid": ("PID", "进程号"),
    "silent": ("Last heartbeat", "最近心跳"),
    "started": ("Started", "启动时间"),
    "ago": ("{} s ago", "{} 秒前"),
    "last_run": ("Last run", "上次运行"),
    "duration": ("Duration", "耗时"),
    "runs": ("Runs", "次数"),
    "active": ("Active", "已激活"),
    "serving": ("Serving", "服务中"),
    "wanted": ("Named by rules", "规则引用"),
    "time": ("Time", "时间"),
    "severity": ("Severity", "级别"),
    "subject": ("Subject", "对象"),
    "text": ("What happened", "内容"),
    "retry": ("Retry", "重试"),
    "nothing": ("Nothing here yet.", "暂无内容。"),
    "sync_off": ("Off: nothing leaves the building.", "已关闭：数据不出院。"),
    "no_changes": (
        "Changes are off here: the page is not on a loopback address. Use 'dicomnode jobs retry' on the node.",
        "此处不可操作：页面不在本机回环地址上。请在节点上使用 dicomnode jobs retry。",
    ),
    "disclaimer": (
        "Studies appear by a short hash; patient data is never shown here. Not for diagnosis.",
        "检查以短哈希显示；此页面不显示患者信息。不用于诊断。",
    ),
    "pending": ("waiting", "等待"),
    "running": ("running", "运行中"),
    "done": ("done", "完成"),
    "refused": ("refused", "被拒"),
    "failed": ("failed", "失败"),
    "superseded": ("superseded", "已被取代"),
    "sending": ("sending", "发送中"),
    "stored": ("stored", "已存储"),
    "rejected": ("rejected", "被拒"),
    "committing": ("commitment asked", "存储确认中"),
    "committed": ("committed", "已确认存储"),
    "reporting": ("reporting", "报告中"),
    "reported": ("reported", "已报告"),
    "asking": ("asking", "请求中"),
    "answered": ("answered", "已答复"),
    "abandoned": ("no report in time", "未按时报告"),
    "asked": ("Asked", "请求"),
    "asked_by": ("by {}", "来自 {}"),
    "asked_of": ("of {}", "发往 {}"),
    "not_committed": ("Not committed", "未确认"),
    "starting": ("starting", "启动中"),
    "stopping": ("stopping", "停止中"),
    "silent_state": ("silent", "无响应"),
    "info": ("info", "信息"),
    "warning": ("warning", "警告"),
    "stat": ("stat", "急诊"),
    "routine": ("routine", "常规"),
    "batch": ("batch", "批量"),
    "downloading": ("downloading", "下载中"),
    "activated": ("activated", "已激活"),
    "placed": ("placed, not active", "已就位，未激活"),
    "model_versions": ("Model versions", "模型版本"),
    "comparisons": ("Comparisons", "版本对比"),
    "history": ("History", "变更记录"),
    "share": ("Canary of", "灰度范围"),
    "since": ("Since", "起始时间"),
    "analyses": ("Analyses", "分析数"),
    "failures": ("Failures", "失败数"),
    "median_time": ("Median time", "耗时中位数"),
    "agreement": ("Agreement / compared", "一致率 / 对比数"),
    "least_dice": ("Least Dice", "最低 Dice"),
    "drift": ("Drift (PSI)", "漂移 (PSI)"),
    "job": ("Job", "任务"),
    "against": ("Against", "对照版本"),
    "compared_as": ("As", "方式"),
    "greatest_difference": ("Greatest difference", "最大测量差异"),
    "same_findings": ("Same findings", "发现一致"),
    "seconds_own": ("Seconds", "耗时（秒）"),
    "seconds_other": ("Seconds, other", "对照耗时（秒）"),
    "who": ("Who", "操作者"),
    "why": ("Why", "原因"),
    "previous_version": ("the version before", "上一版本"),
    "staged": ("staged", "已暂存"),
    "shadow": ("shadow", "影子运行"),
    "canary": ("canary", "灰度"),
    "retired": ("retired", "已退役"),
    "default": ("serves by default", "默认服务"),
    "unlisted": ("not staged", "未登记"),
    "do_stage": ("Stage", "暂存"),
    "do_shadow": ("Shadow", "影子运行"),
    "do_activate": ("Activate", "激活"),
    "do_retire": ("Retire", "退役"),
    "do_rollback": ("Roll back", "回滚"),
}


def word(key: str, language: Language) -> str:
    """The text of ``key``; an unknown key (a state of a newer version) is shown as it is."""
    found = WORDS.get(key)
    return key if found is None else found[1 if language == "zh" else 0]


def choose_language(query: str | None, accept: str) -> Language:
    """``?lang=`` wins, then Accept-Language (RFC 9110 12.5.4), then English."""
    if query is not None and query in LANGUAGES:
        return LANGUAGES[query]
    best: tuple[float, Language] | None = None
    for part in accept[:256].split(","):
        tag, _, parameters = part.strip().partition(";")
        language = LANGUAGES.get(tag.strip().lower().partition("-")[0])
        try:
            quality = float(parameters.partition("q=")[2] or 1.0)
        except ValueError:
            quality = 0.0
        if language and quality > 0 and (best is None or quality > best[0]):
            best = (quality, language)
    return best[1] if best else "en"

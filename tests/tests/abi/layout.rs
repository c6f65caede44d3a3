//! Every structure, field and constant that crates/abi declares, and the numbers of
//! crates/types, against the installed headers: a generated C program prints theirs.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::process::Command;

use freeflow_types::{
    Access, AsyncEventType, Mtu, MwType, Opcode, QpAttrMask, QpState, QpType, SendFlags, WcFlags,
    WcOpcode, WcStatus,
};

use crate::support::{compile, compiles, headers, printed, scratch};

/// A structure or union of crates/abi.
struct Type {
    name: &'static str,
    size: usize,
    align: usize,
    fields: Vec<Field>,
}

struct Field {
    name: &'static str,
    offset: usize,
    size: usize,
}

fn size_of_field<T, F>(_: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

#[allow(
    clippy::undocumented_unsafe_blocks,
    reason = "generated: functions that are never called, for the types of unions' fields"
)]
#[allow(clippy::unnecessary_cast, reason = "generated")]
mod declared {
    use super::{Field, Type, size_of_field};

    include!(concat!(env!("OUT_DIR"), "/declared.rs"));

    pub(super) fn all() -> (Vec<Type>, Vec<(&'static str, i128)>) {
        (types(), values())
    }
}

const PREAMBLE: &str = "#include <stddef.h>\n#include <stdio.h>\n#include <pthread.h>\n\
                        #include <infiniband/verbs.h>\n#include <rdma/rdma_cma.h>\n";

/// Types that no expression of C names: that of a provider's header, which is not installed, and
/// a union without a name whose fields are its structure's (their place is compared there).
const NOT_IN_HEADERS: [&str; 3] = ["verbs_device", "ibv_send_wr_more", "ibv_buf"];

/// Types that have another name in C.
const TYPES: [(&str, &str); 4] = [
    ("ibv_gid", "union ibv_gid"),
    ("pthread_mutex", "pthread_mutex_t"),
    ("pthread_cond", "pthread_cond_t"),
    (
        "rdma_cm_event_param",
        "__typeof__(((struct rdma_cm_event *)0)->param)",
    ),
];

/// Types that have no name in C: of which structure they are which field.
const UNNAMED: [(&str, &str, &str); 9] = [
    ("ibv_send_wr_wr", "ibv_send_wr", "wr"),
    ("ibv_send_wr_rdma", "ibv_send_wr", "wr.rdma"),
    ("ibv_send_wr_atomic", "ibv_send_wr", "wr.atomic"),
    ("ibv_send_wr_ud", "ibv_send_wr", "wr.ud"),
    ("ibv_send_wr_bind_mw", "ibv_send_wr", "bind_mw"),
    ("ibv_send_wr_tso", "ibv_send_wr", "tso"),
    ("ibv_ops_wr_tm", "ibv_ops_wr", "tm"),
    ("ibv_ops_wr_tm_add", "ibv_ops_wr", "tm.add"),
    ("ibv_async_element", "ibv_async_event", "element"),
];

/// Fields that have another name in C, or stand for several: the first and the last of them.
const FIELDS: [(&str, &str, &str); 14] = [
    (
        "ibv_odp_caps.rc_odp_caps",
        "per_transport_caps.rc_odp_caps",
        "",
    ),
    (
        "ibv_odp_caps.uc_odp_caps",
        "per_transport_caps.uc_odp_caps",
        "",
    ),
    (
        "ibv_odp_caps.ud_odp_caps",
        "per_transport_caps.ud_odp_caps",
        "",
    ),
    ("ibv_cq_ex.cq", "context", "async_events_completed"),
    (
        "ibv_context_ops._compat_alloc_pd_to_dereg_mr",
        "_compat_alloc_pd",
        "_compat_dereg_mr",
    ),
    (
        "ibv_context_ops._compat_cq_event_to_destroy_srq",
        "_compat_cq_event",
        "_compat_destroy_srq",
    ),
    (
        "ibv_context_ops._compat_create_qp_to_destroy_qp",
        "_compat_create_qp",
        "_compat_destroy_qp",
    ),
    (
        "ibv_context_ops._compat_create_ah_to_async_event",
        "_compat_create_ah",
        "_compat_async_event",
    ),
    ("verbs_context.abi_placeholder1", "ABI_placeholder1", ""),
    ("verbs_context.abi_placeholder2", "ABI_placeholder2", ""),
    ("verbs_context.abi_placeholder3", "_ABI_placeholder3", ""),
    ("ibv_send_wr.remote_srqn", "qp_type.xrc.remote_srqn", ""),
    // The longest member of a union without a name.
    ("ibv_send_wr.more", "bind_mw", ""),
    ("ibv_async_element.object", "qp", ""),
];

/// Names that are keywords of Rust, and what we call them.
const KEYWORDS: [(&str, &str); 2] = [("private", "priv"), ("kind", "type")];

/// What releases of rdma-core after 44 added: left out if the installed header has it not.
const NEWER: [&str; 30] = [
    "IBV_ACCESS_FLUSH_GLOBAL",
    "IBV_ACCESS_FLUSH_PERSISTENT",
    "IBV_DEVICE_ATOMIC_WRITE",
    "IBV_DEVICE_FLUSH_GLOBAL",
    "IBV_DEVICE_FLUSH_PERSISTENT",
    "IBV_WC_FLUSH",
    "IBV_WR_FLUSH",
    "IBV_QP_EX_WITH_FLUSH",
    "IBV_ODP_SUPPORT_FLUSH",
    "IBV_ODP_SUPPORT_ATOMIC_WRITE",
    "IBV_REG_MR_MASK_IOVA",
    "IBV_REG_MR_MASK_ADDR",
    "IBV_REG_MR_MASK_FD",
    "IBV_REG_MR_MASK_FD_OFFSET",
    "IBV_REG_MR_MASK_DMAH",
    "IBV_REG_MR_MASK_BUF",
    "RDMA_CM_EVENT_ADDRINFO_RESOLVED",
    "RDMA_CM_EVENT_ADDRINFO_ERROR",
    "RDMA_CM_EVENT_USER",
    "rdma_cm_event_param.arg",
    "ibv_dmah",
    "ibv_mr_init_attr",
    "ibv_port_attr.active_speed_ex",
    "ibv_qp_ex.wr_flush",
    "verbs_context.free_buf",
    "verbs_context.alloc_buf",
    "verbs_context.dm_export_dmabuf_fd",
    "verbs_context.reg_mr_ex",
    "verbs_context.dealloc_dmah",
    "verbs_context.alloc_dmah",
];

/// Structures that grow upward: offsets count from this field.
const GROWS_UPWARD: [(&str, &str); 1] = [("verbs_context", "context")];

fn c_type(name: &str) -> String {
    if let Some((_, c)) = TYPES.iter().find(|(ours, _)| *ours == name) {
        return (*c).to_owned();
    }
    match UNNAMED.iter().find(|(ours, _, _)| *ours == name) {
        Some((_, of, field)) => format!("__typeof__(((struct {of} *)0)->{field})"),
        None => format!("struct {name}"),
    }
}

/// First and last C field that a field of ours stands for.
fn c_field<'a>(path: &str, name: &'a str) -> (&'a str, &'a str) {
    match FIELDS.iter().find(|(ours, _, _)| *ours == path) {
        None => {
            let renamed = KEYWORDS.iter().find(|(ours, _)| *ours == name);
            let c = renamed.map_or(name, |(_, c)| c);
            (c, c)
        }
        Some((_, only, "")) => (only, only),
        Some((_, first, last)) => (first, last),
    }
}

/// What is compared: name and numbers.
type Facts = BTreeMap<String, String>;

/// Our numbers, and the C program that prints the header's.
fn layouts(ours: &mut Facts, program: &mut String, types: &[Type]) {
    for of in types {
        if NOT_IN_HEADERS.contains(&of.name) {
            continue;
        }
        let c = c_type(of.name);
        let probe = format!("{PREAMBLE}size_t probe = sizeof({c});\n");
        if NEWER.contains(&of.name) && !compiles(&probe) {
            continue;
        }
        let anchor = GROWS_UPWARD.iter().find(|(name, _)| *name == of.name);
        let anchor = anchor.map(|(_, field)| *field);
        let base = anchor.map_or(0, |anchor| {
            let field = of.fields.iter().find(|f| f.name == anchor);
            field.expect("the anchor is a field").offset as i64
        });
        let c_base = anchor.map_or("0".to_owned(), |a| format!("(long)offsetof({c}, {a})"));
        // Where the installed header's structure ends, if it is an older one.
        let mut end = of.size;
        for field in &of.fields {
            let path = format!("{}.{}", of.name, field.name);
            let (first, last) = c_field(&path, field.name);
            let probe = format!("{PREAMBLE}size_t probe = offsetof({c}, {first});\n");
            if NEWER.contains(&path.as_str()) && !compiles(&probe) {
                // A union's members all begin where it does.
                if field.offset != 0 {
                    end = end.min(field.offset);
                }
                continue;
            }
            let offset = field.offset as i64 - base;
            ours.insert(path.clone(), format!("{offset}+{}", field.size));
            writeln!(
                program,
                "printf(\"{path} %ld+%zu\\n\", (long)offsetof({c}, {first}) - {c_base}, \
                 offsetof({c}, {last}) + sizeof((({c} *)0)->{last}) - offsetof({c}, {first}));"
            )
            .expect("it is a string");
        }
        let size = if anchor.is_some() {
            of.size as i64 - base
        } else {
            end as i64
        };
        let name = format!("sizeof.{}", of.name);
        ours.insert(name.clone(), format!("{size} align {}", of.align));
        writeln!(
            program,
            "printf(\"{name} %ld align %zu\\n\", (long)sizeof({c}) - {c_base}, _Alignof({c}));"
        )
        .expect("it is a string");
    }
}

/// Named values of crates/types, by their C names.
fn numbers() -> Vec<(String, i128)> {
    fn all<T>(from_raw: fn(u32) -> Option<T>, name: fn(T) -> &'static str) -> Vec<(String, i128)> {
        let known = (0..=u8::MAX.into()).filter_map(|raw| Some((from_raw(raw)?, raw)));
        known
            .map(|(value, raw)| (name(value).to_owned(), raw.into()))
            .collect()
    }
    fn flags<T: bitflags::Flags<Bits: Into<i128>>>(prefix: &str) -> Vec<(String, i128)> {
        T::all()
            .iter_names()
            .map(|(name, flag)| (format!("{prefix}{name}"), flag.bits().into()))
            .collect()
    }
    let mut all = [
        all(QpType::from_raw, qp_type),
        all(QpState::from_raw, qp_state),
        all(Opcode::from_raw, opcode),
        all(WcOpcode::from_raw, wc_opcode),
        all(WcStatus::from_raw, wc_status),
        all(MwType::from_raw, mw_type),
        all(Mtu::from_raw, mtu),
        all(AsyncEventType::from_raw, event),
        flags::<Access>("IBV_ACCESS_"),
        flags::<SendFlags>("IBV_SEND_"),
        flags::<WcFlags>("IBV_WC_"),
        flags::<QpAttrMask>("IBV_QP_"),
    ]
    .concat();
    let optional = Access::OPTIONAL_RANGE.into();
    all.push(("IBV_ACCESS_OPTIONAL_RANGE".to_owned(), optional));
    all
}

fn qp_type(value: QpType) -> &'static str {
    match value {
        QpType::Rc => "IBV_QPT_RC",
        QpType::Uc => "IBV_QPT_UC",
        QpType::Ud => "IBV_QPT_UD",
        QpType::XrcSend => "IBV_QPT_XRC_SEND",
        QpType::XrcRecv => "IBV_QPT_XRC_RECV",
    }
}

fn qp_state(value: QpState) -> &'static str {
    match value {
        QpState::Reset => "IBV_QPS_RESET",
        QpState::Init => "IBV_QPS_INIT",
        QpState::Rtr => "IBV_QPS_RTR",
        QpState::Rts => "IBV_QPS_RTS",
        QpState::Sqd => "IBV_QPS_SQD",
        QpState::Sqe => "IBV_QPS_SQE",
        QpState::Err => "IBV_QPS_ERR",
    }
}

fn opcode(value: Opcode) -> &'static str {
    match value {
        Opcode::RdmaWrite => "IBV_WR_RDMA_WRITE",
        Opcode::RdmaWriteImm => "IBV_WR_RDMA_WRITE_WITH_IMM",
        Opcode::Send => "IBV_WR_SEND",
        Opcode::SendImm => "IBV_WR_SEND_WITH_IMM",
        Opcode::RdmaRead => "IBV_WR_RDMA_READ",
        Opcode::CompareSwap => "IBV_WR_ATOMIC_CMP_AND_SWP",
        Opcode::FetchAdd => "IBV_WR_ATOMIC_FETCH_AND_ADD",
        Opcode::LocalInv => "IBV_WR_LOCAL_INV",
        Opcode::BindMw => "IBV_WR_BIND_MW",
        Opcode::SendInv => "IBV_WR_SEND_WITH_INV",
        Opcode::Flush => "IBV_WR_FLUSH",
        Opcode::AtomicWrite => "IBV_WR_ATOMIC_WRITE",
    }
}

fn wc_opcode(value: WcOpcode) -> &'static str {
    match value {
        WcOpcode::Send => "IBV_WC_SEND",
        WcOpcode::RdmaWrite => "IBV_WC_RDMA_WRITE",
        WcOpcode::RdmaRead => "IBV_WC_RDMA_READ",
        WcOpcode::CompareSwap => "IBV_WC_COMP_SWAP",
        WcOpcode::FetchAdd => "IBV_WC_FETCH_ADD",
        WcOpcode::BindMw => "IBV_WC_BIND_MW",
        WcOpcode::LocalInv => "IBV_WC_LOCAL_INV",
        WcOpcode::Flush => "IBV_WC_FLUSH",
        WcOpcode::AtomicWrite => "IBV_WC_ATOMIC_WRITE",
        WcOpcode::Recv => "IBV_WC_RECV",
        WcOpcode::RecvRdmaWithImm => "IBV_WC_RECV_RDMA_WITH_IMM",
    }
}

fn wc_status(value: WcStatus) -> &'static str {
    match value {
        WcStatus::Success => "IBV_WC_SUCCESS",
        WcStatus::LocLenErr => "IBV_WC_LOC_LEN_ERR",
        WcStatus::LocQpOpErr => "IBV_WC_LOC_QP_OP_ERR",
        WcStatus::LocEecOpErr => "IBV_WC_LOC_EEC_OP_ERR",
        WcStatus::LocProtErr => "IBV_WC_LOC_PROT_ERR",
        WcStatus::WrFlushErr => "IBV_WC_WR_FLUSH_ERR",
        WcStatus::MwBindErr => "IBV_WC_MW_BIND_ERR",
        WcStatus::BadRespErr => "IBV_WC_BAD_RESP_ERR",
        WcStatus::LocAccessErr => "IBV_WC_LOC_ACCESS_ERR",
        WcStatus::RemInvReqErr => "IBV_WC_REM_INV_REQ_ERR",
        WcStatus::RemAccessErr => "IBV_WC_REM_ACCESS_ERR",
        WcStatus::RemOpErr => "IBV_WC_REM_OP_ERR",
        WcStatus::RetryExcErr => "IBV_WC_RETRY_EXC_ERR",
        WcStatus::RnrRetryExcErr => "IBV_WC_RNR_RETRY_EXC_ERR",
        WcStatus::GeneralErr => "IBV_WC_GENERAL_ERR",
    }
}

fn mw_type(value: MwType) -> &'static str {
    match value {
        MwType::One => "IBV_MW_TYPE_1",
        MwType::Two => "IBV_MW_TYPE_2",
    }
}

fn mtu(value: Mtu) -> &'static str {
    match value {
        Mtu::B256 => "IBV_MTU_256",
        Mtu::B512 => "IBV_MTU_512",
        Mtu::B1024 => "IBV_MTU_1024",
        Mtu::B2048 => "IBV_MTU_2048",
        Mtu::B4096 => "IBV_MTU_4096",
    }
}

fn event(value: AsyncEventType) -> &'static str {
    match value {
        AsyncEventType::CqErr => "IBV_EVENT_CQ_ERR",
        AsyncEventType::QpFatal => "IBV_EVENT_QP_FATAL",
        AsyncEventType::QpReqErr => "IBV_EVENT_QP_REQ_ERR",
        AsyncEventType::QpAccessErr => "IBV_EVENT_QP_ACCESS_ERR",
        AsyncEventType::CommEst => "IBV_EVENT_COMM_EST",
        AsyncEventType::SqDrained => "IBV_EVENT_SQ_DRAINED",
        AsyncEventType::PathMig => "IBV_EVENT_PATH_MIG",
        AsyncEventType::PathMigErr => "IBV_EVENT_PATH_MIG_ERR",
        AsyncEventType::DeviceFatal => "IBV_EVENT_DEVICE_FATAL",
        AsyncEventType::PortActive => "IBV_EVENT_PORT_ACTIVE",
        AsyncEventType::PortErr => "IBV_EVENT_PORT_ERR",
        AsyncEventType::LidChange => "IBV_EVENT_LID_CHANGE",
        AsyncEventType::PkeyChange => "IBV_EVENT_PKEY_CHANGE",
        AsyncEventType::SmChange => "IBV_EVENT_SM_CHANGE",
        AsyncEventType::SrqErr => "IBV_EVENT_SRQ_ERR",
        AsyncEventType::SrqLimitReached => "IBV_EVENT_SRQ_LIMIT_REACHED",
        AsyncEventType::QpLastWqeReached => "IBV_EVENT_QP_LAST_WQE_REACHED",
        AsyncEventType::ClientReregister => "IBV_EVENT_CLIENT_REREGISTER",
        AsyncEventType::GidChange => "IBV_EVENT_GID_CHANGE",
        AsyncEventType::WqFatal => "IBV_EVENT_WQ_FATAL",
    }
}

#[test]
fn layouts_and_numbers_are_the_headers() {
    if !headers("layouts_and_numbers_are_the_headers") {
        return;
    }
    let (types, constants) = declared::all();
    let mut ours = Facts::new();
    let mut program = format!("{PREAMBLE}int main(void)\n{{\n");
    layouts(&mut ours, &mut program, &types);
    let constants = constants.into_iter().map(|(n, v)| (n.to_owned(), v));
    for (name, value) in constants.chain(numbers()) {
        let probe = format!("{PREAMBLE}int probe[] = {{ (int){name} }};\n");
        if NEWER.contains(&name.as_str()) && !compiles(&probe) {
            continue;
        }
        writeln!(program, "printf(\"{name} %lld\\n\", (long long)({name}));")
            .expect("it is a string");
        ours.insert(name, value.to_string());
    }
    program.push_str("return 0;\n}\n");
    let source = scratch("layout.c");
    std::fs::write(&source, program).expect("the directory is writable");
    let program = compile::<&str>("layout", &source, &[]);
    let theirs: Facts = printed(&mut Command::new(program))
        .lines()
        .map(|line| line.split_once(' ').expect("name and numbers"))
        .map(|(name, facts)| (name.to_owned(), facts.to_owned()))
        .collect();
    assert_eq!(ours.len(), theirs.len());
    assert!(ours.len() > 300, "only {} facts", ours.len());
    let wrong: Vec<_> = ours
        .iter()
        .filter(|(name, facts)| theirs.get(*name) != Some(facts))
        .map(|(name, facts)| format!("{name}: ours {facts}, the header's {:?}", theirs.get(name)))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

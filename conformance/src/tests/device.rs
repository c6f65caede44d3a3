//! What a device says of itself.

use core::ffi::CStr;

use freeflow_abi::*;

use crate::suite::{Env, Outcome, check, fail, same, tests};
use crate::verbs::{Context, verb};

tests! { "device";
    listed_and_opened_often OneProcess "ibv_get_device_list(3), ibv_open_device(3)";
    list OneProcess "ibv_get_device_list(3), ibv_free_device_list(3)";
    attributes OneProcess "ibv_query_device(3)";
    port OneProcess "ibv_query_port(3)";
    tables OneProcess "ibv_query_gid(3), ibv_query_pkey(3)";
    names_of_statuses OneProcess "ibv_wc_status_str(3)";
}

fn open(env: &Env) -> Outcome<std::sync::Arc<Context>> {
    Context::open(env.device.as_deref(), env.gid_index)
}

fn listed_and_opened_often(env: &Env) -> Outcome {
    let first = open(env)?;
    for _ in 0..10 {
        let again = open(env)?;
        same!(again.name, first.name, "name");
        check!(again.ptr != first.ptr, "the same context twice");
    }
    Ok(())
}

fn list(env: &Env) -> Outcome {
    let name_of = |device: *mut ibv_device| {
        let name = verb!(ibv_get_device_name(device));
        // SAFETY: the library gives a string that lives as long as the device.
        unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
    };
    let mut names = Vec::new();
    let mut number = -1;
    for count in [&raw mut number, core::ptr::null_mut()] {
        let list = verb!(ibv_get_device_list(count));
        check!(!list.is_null(), "no list of devices");
        let mut found = Vec::new();
        // SAFETY: the list ends with a null pointer.
        let each = (0..).map(|n| unsafe { *list.add(n) });
        for device in each.take_while(|device| !device.is_null()) {
            found.push(name_of(device));
        }
        same!(found.len() as i32, number, "devices before the null pointer");
        names.push(found);
        verb!(ibv_free_device_list(list));
    }
    same!(names[0], names[1], "devices, asked for with and without their number");
    // A device that is open stays when the list that it was taken from is freed.
    let ctx = open(env)?;
    // SAFETY: an open context.
    let device = unsafe { (*ctx.ptr).device };
    same!(name_of(device), ctx.name, "name of the open context's device");
    check!(names[0].contains(&name_of(device)), "the open device is not in the list");
    Ok(())
}

fn attributes(env: &Env) -> Outcome {
    let ctx = open(env)?;
    let attr = &ctx.attr;
    for (what, value) in [
        ("max_qp", attr.max_qp),
        ("max_qp_wr", attr.max_qp_wr),
        ("max_sge", attr.max_sge),
        ("max_cq", attr.max_cq),
        ("max_cqe", attr.max_cqe),
        ("max_mr", attr.max_mr),
        ("max_pd", attr.max_pd),
        ("max_qp_rd_atom", attr.max_qp_rd_atom),
        ("max_qp_init_rd_atom", attr.max_qp_init_rd_atom),
        ("max_pkeys", attr.max_pkeys.into()),
    ] {
        check!(value > 0, "{what} is {value}");
    }
    same!(attr.phys_port_cnt, 1, "phys_port_cnt");
    check!(attr.max_mr_size > 0, "max_mr_size is 0");
    if let Some(more) = ctx.attr_ex() {
        same!(more.orig_attr.max_qp, attr.max_qp, "max_qp by the two ways of asking");
        same!(more.orig_attr.node_guid, attr.node_guid, "node_guid by the two ways of asking");
    }
    Ok(())
}

fn port(env: &Env) -> Outcome {
    let ctx = open(env)?;
    same!(ctx.port.state, IBV_PORT_ACTIVE, "state");
    same!(ctx.port.link_layer, IBV_LINK_LAYER_ETHERNET, "link_layer");
    check!(ctx.port.active_mtu <= ctx.port.max_mtu, "active_mtu beyond max_mtu");
    check!(ctx.port.gid_tbl_len > ctx.gid_index.into(), "gid_tbl_len {}", ctx.port.gid_tbl_len);
    check!(ctx.port.pkey_tbl_len >= 1, "pkey_tbl_len {}", ctx.port.pkey_tbl_len);
    check!(ctx.port.max_msg_sz > 0, "max_msg_sz 0");
    let mut port = ibv_port_attr::default();
    for number in [0, 2, 255] {
        let got = verb!(ibv_query_port(ctx.ptr, number, &mut port));
        check!(got != 0, "port {number} was queried");
    }
    Ok(())
}

fn tables(env: &Env) -> Outcome {
    let ctx = open(env)?;
    let mut pkey = 0;
    same!(verb!(ibv_query_pkey(ctx.ptr, 1, 0, &mut pkey)), 0, "ibv_query_pkey");
    same!(pkey, 0xFFFF, "the default P_Key");
    let mut gid = ibv_gid { raw: [0; 16] };
    // Every entry of the table may be asked for: an empty one is zero.
    for index in 0..ctx.port.gid_tbl_len {
        same!(verb!(ibv_query_gid(ctx.ptr, 1, index, &mut gid)), 0, "ibv_query_gid({index})");
    }
    check!(
        verb!(ibv_query_gid(ctx.ptr, 1, ctx.port.gid_tbl_len, &mut gid)) != 0,
        "an entry past the table"
    );
    check!(ctx.gid != [0; 16], "the GID in use is zero");
    Ok(())
}

fn names_of_statuses(_env: &Env) -> Outcome {
    let mut seen = Vec::new();
    for status in 0..=IBV_WC_TM_RNDV_INCOMPLETE {
        let text = verb!(ibv_wc_status_str(status));
        check!(!text.is_null(), "no name of status {status}");
        // SAFETY: the library gives a string that is never freed.
        let text = unsafe { CStr::from_ptr(text) }.to_bytes();
        if text.is_empty() || seen.contains(&text) {
            fail!("status {status} has no name of its own");
        }
        seen.push(text);
    }
    Ok(())
}

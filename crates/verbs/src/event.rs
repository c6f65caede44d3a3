//! Asynchronous events.

use core::ffi::{c_int, c_void};

use freeflow_abi::*;
use freeflow_client::Element;

use crate::objects::{Base, context, minus_one};

/// `IBV_EVENT_CQ_ERR`.
const CQ_ERR: u32 = 0;
/// The events that are about a shared receive queue.
const SRQ_ERR: u32 = 14;
const SRQ_LIMIT_REACHED: u32 = 15;
/// First and last of the events that are about a port or the device.
const DEVICE_FATAL: u32 = 8;
const SM_CHANGE: u32 = 13;
const CLIENT_REREGISTER: u32 = 17;
const GID_CHANGE: u32 = 18;

/// `ibv_get_async_event(3)`: 0, or -1 with errno.
pub(crate) unsafe extern "C" fn get_async_event(
    ctx: *mut ibv_context,
    event: *mut ibv_async_event,
) -> c_int {
    // SAFETY: the caller gives an open context.
    let got = unsafe { context(ctx) }.client.get_async_event();
    minus_one(got.map(|got| {
        let element = match got.element {
            Element::Qp(user) | Element::Cq(user) | Element::Srq(user) => ibv_async_element {
                object: user as *mut c_void,
            },
            Element::Port(port) => ibv_async_element {
                port_num: port.into(),
            },
            Element::Device => ibv_async_element {
                object: std::ptr::null_mut(),
            },
        };
        // SAFETY: the caller gives room for the event.
        unsafe {
            *event = ibv_async_event {
                element,
                event_type: got.kind.raw(),
            }
        };
    }))
}

/// `ibv_ack_async_event(3)`.
pub(crate) unsafe extern "C" fn ack_async_event(event: *mut ibv_async_event) {
    // SAFETY: the caller gives an event it was given; its object lives until now.
    unsafe {
        let object = (*event).element.object;
        match (*event).event_type {
            CQ_ERR => ibv_cq::object(object.cast()).client.ack_async(1),
            SRQ_ERR | SRQ_LIMIT_REACHED => ibv_srq::object(object.cast()).client.ack_async(1),
            DEVICE_FATAL..=SM_CHANGE | CLIENT_REREGISTER | GID_CHANGE => {}
            _ => ibv_qp::object(object.cast()).client.ack_async(1),
        }
    }
}
